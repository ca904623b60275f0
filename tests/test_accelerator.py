import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLE, FAST, files
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.long

STANDIN = Path(__file__).with_name("accelerator.py")
SHORT = ["--num-samples", "12", "--max-seq-length", "32", "--batch-size", "2", "--learning-rate", "1e-3"]
FINETUNE = [*SHORT, "--steps", "4", "--evaluate-every", "1"]


def on_device(*arguments):
    return subprocess.Popen(
        [sys.executable, STANDIN, *map(str, arguments)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=STANDIN.parents[1]
    )


def finished(*arguments):
    process = on_device(*arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    return out


@pytest.fixture(scope="module")
def refactored(tmp_path_factory):
    out = tmp_path_factory.mktemp("device") / "out"
    finished("prism-refactor", EXAMPLE, out, *FAST, "--dtype", "float32")
    return out


def test_the_stand_in_refuses_what_a_gpu_refuses():
    lines = [
        "import torch, accelerator",
        "accelerator.install()",
        "with accelerator.Installed():",
        "    there, here = torch.ones(2, device='standin'), torch.ones(2)",
        "    assert (there + there.sum().item()).device.type == 'standin' and there.cpu().device.type == 'cpu'",
        "    for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there.long()], there.numpy):",
        "        try: mixed()",
        "        except (RuntimeError, TypeError) as error: print(type(error).__name__)",
    ]
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=STANDIN.parent, check=False)
    assert result.stdout.split() == ["RuntimeError"] * 3 + ["TypeError"], result.stderr


def losses(folder):
    layers = json.loads((folder / "prism.json").read_text())["layers"]
    return torch.tensor([expert["loss_after"] for layer in layers for expert in layer["experts"]])


def test_refactoring_on_a_device_is_that_on_the_cpu(tmp_path, refactored, command):
    assert command("prism-refactor", EXAMPLE, tmp_path / "out", *FAST, "--dtype", "float32").code == 0
    # Attention's kernels are others, and with them the last bits.
    assert torch.allclose(losses(refactored), losses(tmp_path / "out"), atol=0.01)
    assert "ok" in finished("prism-verify", EXAMPLE, refactored, "--num-samples", "2", "--max-seq-length", "64")


def test_evaluation_on_a_device_is_that_on_the_cpu(refactored, command):
    options = ["--num-tokens", "256", "--dtype", "float32", "--router", "both", "--budget", "25%", "--quiet", "--json"]
    found = [finished("prism-eval", EXAMPLE, refactored, *options), command("prism-eval", EXAMPLE, refactored, *options).out]
    device, cpu = (json.loads(each) for each in found)
    assert len(device["refactored"]) == 2
    for there, here in zip([device["original"], *device["refactored"]], [cpu["original"], *cpu["refactored"]], strict=True):
        assert [point["perplexity"] for point in there["points"]] == pytest.approx(
            [point["perplexity"] for point in here["points"]], rel=1e-3
        )
    within = [each["refactored"][1]["budgets"][0]["perplexity"] for each in (device, cpu)]
    assert within[0] == pytest.approx(within[1], rel=1e-3)


def test_fine_tuning_runs_and_resumes_on_a_device(tmp_path, refactored):
    process = on_device("prism-finetune", refactored, tmp_path / "out", *FINETUNE)
    for line in process.stderr:
        if "step 2 of 4" in line:
            process.send_signal(signal.SIGINT)
            break
    assert process.wait() == 130, process.stderr.read()
    finished("prism-finetune", refactored, tmp_path / "out", *FINETUNE, "--resume")
    finished("prism-finetune", refactored, tmp_path / "whole", *FINETUNE)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert "step" in finished("prism-finetune", refactored, tmp_path / "stock", *FINETUNE, "--router", "stock")


def on_both(script, folder):
    """What a script prints that is given a folder and a device: the stand-in, then the CPU."""
    said = []
    for device in ("standin", "cpu"):
        result = subprocess.run(
            [sys.executable, "-c", script, folder, device], capture_output=True, text=True, cwd=STANDIN.parent, check=False
        )
        assert result.returncode == 0, result.stderr[-2000:]
        said.append(result.stdout)
    return said


ENGINE = """
import sys, torch, accelerator
from pathlib import Path
from prism_refactor.models.loading import load
from prism_refactor.serving.engine import Engine, GenerationRequest
from prism_refactor.serving.scheduling import Limits

accelerator.install()
with accelerator.Installed():
    engine = Engine(load(Path(sys.argv[1]), sys.argv[2], torch.float32), "per-token", Limits(64, 8, kv_tokens=2048))
    loop = engine.batching._manager._run_generation_loop

    def on_device():
        # Both are of a thread.
        torch._C._set_only_lift_cpu_tensors(True)
        with accelerator.Installed():
            loop()

    engine.batching._manager._run_generation_loop = on_device
    engine.start()
    kinds = ((3, 0.0, 1.0), (16, 1.0, 1.0), (7, 0.0, 1.0), (9, 0.7, 0.9))
    rest = {"seed": 1, "logprobs": 1, "stop_at_eos": False}
    requests = [GenerationRequest(list(range(5, 20 + k)), k, 6, temperature, top_p, **rest) for k, temperature, top_p in kinds]
    print([answer.tokens for answer in engine.generate(requests)])
    engine.close()
"""


def test_the_engine_generates_on_a_device_what_it_generates_on_the_cpu(refactored):
    """Mixed k, greedy and sampled, with transformers' grouped experts on the device and our loop on the CPU."""
    said = [json.loads(text.splitlines()[-1]) for text in on_both(ENGINE, refactored)]
    assert said[0] == said[1]
    assert [len(tokens) for tokens in said[0]] == [6] * 4


OFFLOAD = """
import sys, torch, accelerator
from pathlib import Path
from prism_refactor import set_active
from prism_refactor.offload.manager import load_offloaded
from prism_refactor.offload.options import CacheBudget, LatencyTarget

torch.set_grad_enabled(False)
accelerator.install()
with accelerator.Installed():
    model = load_offloaded(Path(sys.argv[1]), CacheBudget("40%"), prefetch="both", device=sys.argv[2])
    ids = torch.arange(5, 25, device=sys.argv[2])[None]
    for k in (16, 7):
        set_active(model, k)
        print(model(input_ids=ids).logits[0].cpu().tolist())
    assert model.offload.counters.misses and model.offload.counters.prefetched
    model.offload.set_latency(LatencyTarget(1e-9, 3))
    # Of one token alone prefetching may bring everything in time.
    for token in ids.T:
        model(input_ids=token[None])
    assert model.offload.counters.skipped
    model.offload.close()
"""


def test_an_offloaded_model_computes_on_a_device_what_it_computes_on_the_cpu(refactored, tmp_path):
    """In float32: in bfloat16 the bits of attention's other kernels decide near ties."""
    exact = shutil.copytree(refactored, tmp_path / "float32")
    for shard in exact.glob("model-*.safetensors"):
        save_file({name: value.float() for name, value in load_file(shard).items()}, shard, {"format": "pt"})
    config = json.loads((exact / "config.json").read_text())
    (exact / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    there, here = (torch.tensor([json.loads(line) for line in text.splitlines()]) for text in on_both(OFFLOAD, exact))
    assert there.shape == (2, 20, 4096)
    assert torch.equal(there.argmax(-1), here.argmax(-1))
    assert torch.allclose(there, here, atol=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    "arguments", [["prism-run", "--prompt", "a"], ["prism-bench"], ["prism-serve"], ["prism-serve", "--fast-memory", "50%"]], ids=" ".join
)
def test_a_gpu_that_is_not_there_is_named(refactored, command, arguments):
    outcome = command(arguments[0], refactored, *arguments[1:], "--device", "cuda")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1].endswith("--device cuda: no CUDA device is available; use --device cpu")
