"""What the plugin uses and changes of vLLM's insides: the one file to open when vLLM moves.

Five changes, each of a function that vLLM looks up when it is called:

- `VllmConfig.__post_init__`: a refactored checkpoint that cannot be served with two-level routing is refused before anything is loaded.
- `create_fused_moe_router` and `MoERunner` (layers/fused_moe/layer.py): every MoE layer gets a `TwoLevelRouter`, and adds what the dropped
  sub-experts are expected to add.
- `BaseModelLoader.load_model`: says how many layers route so, and refuses a model of which some do not.
- `GPUModelRunner._prepare_inputs` (model runner V1, which CPUs use) and `resolve_model_state_cls` (V2): write k or the budget of each token
  of a step.
- `InputProcessor.process_inputs`: checks what a request asks for, and lets it share cached blocks only with requests that ask for the same.

Three faults of vLLM's own are repaired, for all models: OLMoE's tied embeddings (olmoe.py), and on CPUs the rotation of queries by head
(`RotaryEmbedding.forward_cpu`) and the correction of scores (`create_fused_moe_router`).
"""

import functools
import inspect
import json
import re
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils import cached_file

from prism_vllm.checkpoint import ROUTER_FILE, CheckpointError, RefactoredCheckpoint, gate_of
from prism_vllm.routing import ACTIVATIONS, UNGATED, SubRouter, route
from prism_vllm.serving import BUDGET, QUALITY, K, Serving

RELEASES = "0.30 to 0.33"
_MOE, _WORKER = "vllm.model_executor.layers.fused_moe", "vllm.v1.worker"
# What must be there, and the names that its parameters begin with.
_USED = {
    f"{_MOE}.layer:create_fused_moe_router": ("top_k", "global_num_experts"),
    f"{_MOE}.layer:MoERunner.__init__": ("self", "layer_name", "moe_config", "router"),
    f"{_MOE}.layer:MoERunner._apply_quant_method": ("self", "hidden_states", "router_logits"),
    f"{_MOE}.layer:MoERunner.is_monolithic": None,
    f"{_MOE}.layer:MoERunner._fused_output_is_reduced": None,
    f"{_MOE}.router.base_router:BaseRouter.__init__": ("self", "top_k", "global_num_experts", "eplb_state"),
    f"{_MOE}.router.base_router:BaseRouter._compute_routing": ("self", "hidden_states", "router_logits", "indices_type"),
    f"{_MOE}.config:RoutingMethodType.Custom": None,
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model": ("self", "vllm_config", "model_config"),
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.get_all_weights": ("self", "model_config", "model"),
    f"{_WORKER}.gpu_model_runner:GPUModelRunner._prepare_inputs": ("self", "scheduler_output", "num_scheduled_tokens"),
    f"{_WORKER}.gpu.model_states:resolve_model_state_cls": ("vllm_config", "model"),
    f"{_WORKER}.gpu.model_states.interface:ModelState.add_request": ("self", "req_index", "new_req_data"),
    f"{_WORKER}.gpu.model_states.interface:ModelState.prepare_inputs": ("self", "input_batch", "req_states"),
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": ("self", "request_id", "prompt", "params"),
    "vllm.exceptions:VLLMValidationError": None,
    "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding.forward_cpu": ("self", "positions", "query", "key"),
}


def _module(name: str) -> Any:
    """A module of vLLM's, whose types are not known."""
    return import_module(name)


def mismatch() -> str | None:
    """Return what this vLLM lacks of what the plugin uses; None if nothing."""
    for place, expected in _USED.items():
        module, _, path = place.partition(":")
        try:
            found: Any = functools.reduce(getattr, path.split("."), _module(module))
        except (ImportError, AttributeError):
            return f"has no {place}"
        if expected is not None and tuple(inspect.signature(found).parameters)[: len(expected)] != expected:
            return f"has another signature of {place}"
    return None


class StepActive:
    """How many sub-experts each token of the running step runs, for all layers of a worker process; see `routing.route`, `active`.

    Attributes:
        tokens: float32 [largest number of tokens of a step], on the device. Its address never changes: CUDA graphs read it. Numbers behind
            the step's tokens are of earlier steps.
        default: of a request that notes none, as those that warm vLLM up do.
        most: sub-experts that a token runs at most.
        widest: sub-experts that a token of the step may run.
    """

    def __init__(self, config: Any, serving: Serving):
        size, device = config.scheduler_config.max_num_batched_tokens, torch.get_default_device()
        self.tokens = torch.full((size,), float(serving.default), dtype=torch.float32, device=device)
        self.default, self.most = serving.default, serving.checkpoint.most
        self.widest = self.most

    def fill(self, active: "np.ndarray[Any, Any]", counts: "np.ndarray[Any, Any]") -> None:
        """Note that of each request of a step, and its number of tokens, in the order of the batch."""
        self.widest = int(active.max()) if active.min() >= 1 else self.most
        values = torch.from_numpy(np.repeat(active.astype(np.float32), counts))
        if self.tokens.is_cuda:
            values = values.pin_memory()
        self.tokens[: len(values)].copy_(values, non_blocking=True)


# Of this process, while it has a refactored model; vLLM runs one model in a process.
_step: StepActive | None = None


@functools.cache
def _serving(folder: str, revision: str | None, prism: str, most: int, additional: str) -> Serving:
    """That of a checkpoint; `prism` and `additional` are JSON. Cached: every request asks for it."""

    def path(name: str) -> str | None:
        try:
            return cached_file(folder, name, revision=revision)
        except OSError:
            return None

    return Serving.of(RefactoredCheckpoint(json.loads(prism), most, path), json.loads(additional))


def serving_of(config: Any) -> Serving | None:
    """How the model of a `VllmConfig` is served; None where it is not refactored, or has no sub-expert router.

    Raises:
        CheckpointError: the config's options cannot work.
    """
    model: Any = getattr(config, "model_config", None)
    text = getattr(model, "hf_text_config", None)
    prism = getattr(text, "prism", None)
    if not prism or prism["router"] == "replicate":
        return None
    extra = config.additional_config if isinstance(config.additional_config, dict) else {}
    ours = {key: value for key, value in extra.items() if key.startswith("prism_")}
    return _serving(str(model.model), model.revision, json.dumps(prism), getattr(text, prism["top_k"]), json.dumps(ours))


def obstacle(config: Any) -> str | None:
    """Return what of a server's options two-level routing cannot work with; None if nothing."""
    parallel, speculative = config.parallel_config, config.speculative_config
    on_cpu = config.device_config.device_type == "cpu"
    found = {
        "data_parallel_size > 1": parallel.data_parallel_size > 1,
        "prefill_context_parallel_size > 1": parallel.prefill_context_parallel_size > 1,
        "enable_dbo": parallel.use_ubatching,
        "enable_expert_parallel on a CPU, whose kernel ignores it": on_cpu and parallel.enable_expert_parallel,
        "enable_eplb": parallel.enable_eplb,
        "enable_lora": config.lora_config is not None,
        "enable_sleep_mode": config.model_config.enable_sleep_mode,
        "speculative decoding with another method than ngram": speculative is not None and speculative.method != "ngram",
    }
    return next((option for option, given in found.items() if given), None)


def install_checks(problem: str | None) -> None:
    """Refuse, when the engine is configured, what would end in wrong or stock routing.

    Args:
        problem: what `mismatch` has found.
    """
    config_class = _module("vllm.config").VllmConfig
    post_init = config_class.__post_init__

    @functools.wraps(post_init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        post_init(self, *args, **kwargs)
        try:
            serving = serving_of(self)
            if serving is None:
                return
            for key, reason in _NOT_SERVED.items():
                if not serving.checkpoint.config.get(key, True):
                    raise CheckpointError(reason)
            if problem is not None:
                version = _module("vllm").__version__
                raise CheckpointError(f"this plugin was made for vLLM {RELEASES}; {version} {problem}; install one of these")
            refused = obstacle(self)
            if refused is not None:
                raise CheckpointError(
                    f"two-level routing does not work with {refused}; leave it out, or set PRISM_VLLM=0 for stock routing"
                )
            if not serving.checkpoint.blocks:
                raise CheckpointError(f"its {ROUTER_FILE} holds no layer; refactor again")
        except CheckpointError as error:
            raise CheckpointError(f"prism-vllm: {self.model_config.model}: {error}") from None

    config_class.__post_init__ = checked


# By what config.json says is not so.
_NOT_SERVED = {
    "stock": "its experts are stored whole, and vLLM cannot split them; set PRISM_VLLM=0 to serve the original",
    "plain_router": "its router reads more than what its experts read; set PRISM_VLLM=0 for stock routing",
}


def _router_class() -> Any:
    base = _module(f"{_MOE}.router.base_router").BaseRouter
    custom = _module(f"{_MOE}.config").RoutingMethodType.Custom

    class TwoLevelRouter(base):  # type: ignore[misc, valid-type]
        """Routes the tokens of one MoE layer to sub-experts.

        Args:
            original: vLLM's own router of the family, for the original's experts.
            serving: of the model.
            top_k: as config.json says.
            global_num_experts, eplb_state: of the layer.
        """

        # No kernel that routes by itself knows it: vLLM takes one that is told experts and weights.
        routing_method_type = custom

        def __init__(self, original: Any, serving: Serving, top_k: int, global_num_experts: int, eplb_state: Any):
            super().__init__(top_k, global_num_experts, eplb_state)
            self.original, self.factor = original, int(serving.checkpoint.config["factor"])
            self.missing: torch.Tensor | None = None

        def load(self, config: Any, serving: Serving, layer: int, moe: Any) -> None:
            """Read the tensors of decoder layer `layer`; `moe` is its `FusedMoEConfig`."""
            assert _step is not None
            activation = moe.activation.value
            if activation not in ACTIVATIONS and activation not in UNGATED:
                raise CheckpointError(f"prism-vllm: no gating function for the activation {activation}")
            self.activation, self.step = activation, _step
            tensors = {name: value.to(_step.tokens.device) for name, value in serving.checkpoint.tensors(layer).items()}
            # In the type of the router's products. Nothing here may change after loading: compiled code does not look again.
            dtype, bias = moe.router_logits_dtype or config.model_config.dtype, tensors.get("original.bias")
            self.gate, self.gate_bias = gate_of(tensors).to(dtype), None if bias is None else bias.to(dtype)
            self._correct(tensors)
            self.sub_router = SubRouter.of(tensors, activation)
            # Where shapes may change from step to step, slots that no token of the step uses are cut off.
            self.may_cut = bool(config.model_config.enforce_eager)
            # On a CPU vLLM's own compiler sees this code; elsewhere it stands behind an operation that the compiler does not look into.
            plain = config.model_config.enforce_eager or _step.tokens.device.type == "cpu"
            self.route = route if plain else torch.compile(route)

        def _correct(self, tensors: dict[str, torch.Tensor]) -> None:
            """Give the family's router the original correction of its scores, where the family has one."""
            found = [value for name, value in tensors.items() if name.endswith(("correction", "e_score_correction_bias"))]
            if not found:
                return
            own = getattr(self.original, "e_score_correction_bias", None)
            if own is None:
                raise CheckpointError(f"prism-vllm: vLLM's {type(self.original).__name__} does not correct scores as this checkpoint does")
            self.original.e_score_correction_bias = found[0].flatten().to(own.dtype)

        def _compute_routing(
            self, hidden_states: torch.Tensor, router_logits: torch.Tensor, indices_type: torch.dtype | None, **_: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            # A kernel may have padded the inputs.
            hidden = hidden_states[:, : self.gate.shape[1]]
            logits = F.linear(hidden.to(self.gate.dtype), self.gate, self.gate_bias)
            weights, experts = self.original._compute_routing(hidden, logits, None)
            active = self.step.tokens[: len(hidden)]
            weights, chosen, self.missing = self.route(self.sub_router, hidden, weights, experts, active, self.factor, self.activation)
            width = self.step.widest if self.may_cut else self.top_k
            return weights[:, :width].contiguous(), chosen[:, :width].to(indices_type or torch.int32).contiguous()

    return TwoLevelRouter


def install_routing() -> None:
    """Route the MoE layers of refactored models by two levels."""
    layer_module = _module(f"{_MOE}.layer")
    current_config = _module("vllm.config").get_current_vllm_config
    on_cpu = _module("vllm.platforms").current_platform.is_cpu()
    make, two_level = layer_module.create_fused_moe_router, _router_class()

    @functools.wraps(make)
    def create_fused_moe_router(top_k: int, global_num_experts: int, eplb_state: Any = None, **kwargs: Any) -> Any:
        scored = kwargs.get("e_score_correction_bias") is not None or kwargs.get("scoring_func") == "sigmoid"
        if on_cpu and scored and not kwargs.get("use_grouped_topk") and kwargs.get("custom_routing_function") is None:
            # Without groups vLLM's router for CPUs ignores corrections, and knows no sigmoid; one group of all experts is the same.
            kwargs |= {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1}
        serving = serving_of(current_config())
        if serving is None:
            return make(top_k=top_k, global_num_experts=global_num_experts, eplb_state=eplb_state, **kwargs)
        if kwargs.get("num_fused_shared_experts"):
            raise CheckpointError("prism-vllm: the kernel runs shared experts as routed ones; switch that off")
        experts = kwargs.get("num_logical_experts") or global_num_experts
        # vLLM's OLMoE does not look at it.
        kwargs["renormalize"] = getattr(current_config().model_config.hf_text_config, "norm_topk_prob", kwargs.get("renormalize", True))
        if serving.checkpoint.groups > 1:
            kept = int(kwargs["topk_group"]) * serving.checkpoint.groups // int(kwargs["num_expert_group"])
            kwargs |= {"num_expert_group": serving.checkpoint.groups, "topk_group": kept}
        original = make(
            top_k=serving.checkpoint.top_k, global_num_experts=experts // int(serving.checkpoint.config["sub_experts"]), **kwargs
        )
        return two_level(original, serving, top_k, global_num_experts, eplb_state)

    class PrismRunner(layer_module.MoERunner):  # type: ignore[name-defined]
        """Gives its router the tensors of its layer, and adds what the dropped sub-experts are expected to add."""

        def __init__(self, layer_name: str, moe_config: Any, router: Any, *args: Any, **kwargs: Any):
            super().__init__(layer_name, moe_config, router, *args, **kwargs)
            if not isinstance(router, two_level):
                return
            global _step  # noqa: PLW0603  (one model in a process)
            config = current_config()
            serving = serving_of(config)
            found = re.search(r"layers\.(\d+)\.", layer_name)
            assert serving is not None
            assert found is not None, layer_name
            _step = _step or StepActive(config, serving)
            router.load(config, serving, int(found[1]), moe_config)

        def _apply_quant_method(self, *args: Any, **kwargs: Any) -> Any:
            shared, routed = super()._apply_quant_method(*args, **kwargs)
            if isinstance(self.router, two_level) and self.router.missing is not None:
                missing, self.router.missing = self.router.missing, None
                # Where ranks hold parts that are summed afterwards, each adds its part.
                if not self._fused_output_is_reduced:
                    missing = missing / max(self.moe_config.tp_size, self.moe_config.ep_size)
                routed[..., : missing.shape[-1]] += missing.to(routed.dtype)
            return shared, routed

    layer_module.create_fused_moe_router, layer_module.MoERunner = create_fused_moe_router, PrismRunner
    _install_report(two_level, layer_module.MoERunner)


def _install_report(two_level: Any, runner: Any) -> None:
    """Say after loading how the model routes; refuse one that does not as it should."""
    loader = _module("vllm.model_executor.model_loader.base_loader").BaseModelLoader
    logger = _module("vllm.logger").init_logger("vllm.prism")
    load = loader.load_model

    @functools.wraps(load)
    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        model = load(self, vllm_config, model_config, *args, **kwargs)
        serving = serving_of(vllm_config)
        if serving is None:
            return model
        where = f"prism-vllm: {model_config.model}"
        runners = [module for module in model.modules() if isinstance(module, runner)]
        layers = [module for module in runners if isinstance(module.router, two_level)]
        expected = len(serving.checkpoint.blocks)
        if (
            not layers
            or len(layers) < len(runners)
            or (len(layers) != expected and vllm_config.parallel_config.pipeline_parallel_size == 1)
        ):
            raise CheckpointError(f"{where}: vLLM's {type(model).__name__} routes {len(layers)} of {expected} MoE layers by two levels")
        alone = next((module for module in layers if module.is_monolithic), None)
        if alone is not None:
            kernel = type(alone.routed_experts.quant_method).__name__
            raise CheckpointError(f"{where}: the kernel {kernel} routes by itself; choose another with --moe-backend")
        default = f"k = {serving.default}" if serving.default >= 1 else f"a budget of {serving.default:.1%}"
        logger.info("two-level routing on %d layers, %s of %d", len(layers), default, serving.checkpoint.full)
        return model

    loader.load_model = load_model


def install_runners() -> None:
    """Write what each token runs before a step, in both of vLLM's model runners."""
    runner = _module(f"{_WORKER}.gpu_model_runner").GPUModelRunner
    prepare = runner._prepare_inputs

    @functools.wraps(prepare)
    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        if _step is not None:
            params = (self.requests[name].sampling_params for name in self.input_batch.req_ids)
            _step.fill(np.array([_noted(each) for each in params]), num_scheduled_tokens)
        return prepare(self, scheduler_output, num_scheduled_tokens, *args, **kwargs)

    runner._prepare_inputs = _prepare_inputs

    states = _module(f"{_WORKER}.gpu.model_states")
    resolve = states.resolve_model_state_cls

    @functools.wraps(resolve)
    def resolve_model_state_cls(vllm_config: Any, model: Any) -> Any:
        base = resolve(vllm_config, model)

        class PrismModelState(base):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **kwargs)
                self.slot_active = np.ones(self.max_num_reqs)

            def add_request(self, req_index: int, new_req_data: Any) -> None:
                super().add_request(req_index, new_req_data)
                self.slot_active[req_index] = _noted(new_req_data.sampling_params)

            def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
                assert _step is not None
                _step.fill(self.slot_active[input_batch.idx_mapping_np], input_batch.num_scheduled_tokens)
                return super().prepare_inputs(input_batch, req_states)

        return base if _step is None else PrismModelState

    states.resolve_model_state_cls = resolve_model_state_cls


def _noted(params: Any) -> float:
    """k or budget that `install_requests` has noted in a request's parameters."""
    assert _step is not None
    noted = getattr(params, "extra_args", None) or {}
    return float(noted.get(K, noted.get(BUDGET, _step.default)))


def install_requests() -> None:
    """In the front end: note what each request runs, refuse one that cannot be served, and separate the cached blocks by it."""
    processor = _module("vllm.v1.engine.input_processor").InputProcessor
    refusal = _module("vllm.exceptions").VLLMValidationError
    process = processor.process_inputs

    @functools.wraps(process)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        serving = serving_of(self.vllm_config)
        if serving is None or request.sampling_params is None:
            return request
        asked = request.sampling_params.extra_args or {}
        try:
            active = serving.active_of(asked)
        except ValueError as error:
            raise refusal(str(error)) from None
        # The request has its own copy of the parameters, but not of their dicts.
        others = {name: value for name, value in asked.items() if name not in (K, BUDGET, QUALITY)}
        key = K if active >= 1 else BUDGET
        request.sampling_params.extra_args = others | {key: active}
        if active != serving.default:
            request.cache_salt = f"{request.cache_salt or ''}|{key}={active}"
        return request

    processor.process_inputs = process_inputs


def install_repairs() -> None:
    """Repair three things.

    OLMoE's tied embeddings; on CPUs the rotation of queries [T, heads, size], as DeepSeek and LFM2 have them; tensors without elements, of
    shared experts without neurons, which vLLM does not make and does not expect in a checkpoint.
    """
    loader = _module("vllm.model_executor.model_loader.default_loader").DefaultModelLoader
    weights = loader.get_all_weights

    @functools.wraps(weights)
    def get_all_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ((name, value) for name, value in weights(self, *args, **kwargs) if value.numel())

    loader.get_all_weights = get_all_weights
    rotary = _module("vllm.model_executor.layers.rotary_embedding.base").RotaryEmbedding
    forward = rotary.forward_cpu

    @functools.wraps(forward)
    def forward_cpu(self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
        # The kernel takes the distance between a token's heads for that between tokens.
        flat = forward(self, positions, query.flatten(1), None if key is None else key.flatten(1))
        return flat[0].view(query.shape), None if key is None else flat[1].view(key.shape)

    rotary.forward_cpu = forward_cpu
    _module("vllm").ModelRegistry.register_model("OlmoeForCausalLM", "prism_vllm.olmoe:TiedOlmoeForCausalLM")
