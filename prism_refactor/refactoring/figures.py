"""The figures of a refactoring that a requirement may be on, from its manifest."""

from statistics import mean

from prism_refactor.errors import UsageError
from prism_refactor.formats import Manifest
from prism_refactor.requirements import Requirement

# 'dropped': mean share of an expert's activation outside each token's best sub-experts. 'unrouted': experts that saw no token.
# 'error@K': mean over layers of the squared relative error of the layer's output at K sub-experts, with the router that was written.
FIGURES = {"dropped": False, "unrouted": False, "error": True}


def figure(requirement: Requirement, manifest: Manifest) -> float:
    """Return the figure of a requirement. Raises UsageError as `check_position` does."""
    layers = manifest.layers
    if requirement.figure == "dropped":
        return manifest.dropped[1]
    if requirement.figure == "unrouted":
        return manifest.unrouted
    numbers = layers[0].measured_k
    check_position(requirement, numbers)
    column = numbers.index(int(requirement.k(numbers[-1])))
    router = "two-level" if "two-level" in layers[0].output_error else "stock"
    return mean(layer.output_error[router][column] for layer in layers)


def check_position(requirement: Requirement, numbers: list[int]) -> None:
    """Raise UsageError when errors are known at these `numbers` of sub-experts only and the requirement is on another."""
    if requirement.figure == "error" and requirement.k(numbers[-1]) not in numbers:
        raise UsageError(
            f"`require` '{requirement.text}': errors are measured at {', '.join(map(str, numbers))} of {numbers[-1]} sub-experts"
        )
