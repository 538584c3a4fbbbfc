"""Between a torch module and the flat vector of a model.

Trainable parameters come first, then floating-point buffers, then frozen parameters, each in the order the
module lists them: a training step is then one operation on one contiguous piece, and so is what can move at
all, which is what devices send. Integer and boolean
buffers (step counters and the like) belong to one device and stay out.
"""

import torch
from torch import Tensor, nn

from lepton_fl.errors import Rejection, TaskError, UpdateRejected
from lepton_fl.vector import Layout, Vector


def state_tensors(
    module: nn.Module, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Name -> tensor: those that are trained, and the others that are part of the model's state.

    Args:
        module: whose tensors.
        dtype: the only type allowed; anything but float32 is for numerical checks.

    Raises:
        TaskError: a floating-point or complex tensor is not of this type.
    """
    saved = module.state_dict().keys()  # without buffers declared as not persistent
    trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
    frozen = {k: p for k, p in module.named_parameters() if not p.requires_grad}
    buffers = {k: b for k, b in module.named_buffers() if k in saved}
    others: dict[str, Tensor] = {**buffers, **frozen}
    for name, tensor in {**trained, **others}.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != dtype:
            raise TaskError(
                f"Tensor {name!r} of the model is {tensor.dtype}, only {dtype} can be averaged.",
                hint="Keep the model's state in float32; lower precision belongs inside forward().",
            )
    return dict(trained), {k: t for k, t in others.items() if t.is_floating_point()}


def layout_of(module: nn.Module) -> Layout:
    """Which tensors of the module stand where in its vector."""
    trained, others = state_tensors(module)
    fixed = sum(p.numel() for p in module.parameters() if not p.requires_grad and p.is_floating_point())
    return Layout.of_shapes({k: tuple(t.shape) for k, t in {**trained, **others}.items()}, fixed)


def state_vector(module: nn.Module) -> Vector:
    """The module's state, copied: (P,) float32."""
    trained, others = state_tensors(module)
    flat = torch.cat([t.detach().reshape(-1) for t in (*trained.values(), *others.values())])
    vector: Vector = flat.cpu().numpy()
    return vector


def load_vector(module: nn.Module, layout: Layout, flat: Vector) -> None:
    """Write a vector into the module.

    Args:
        module: changed in place, on whatever device it is.
        layout: the one the vector was made with; it must be the module's own.
        flat: (P,) float32.

    Raises:
        UpdateRejected: WRONG_SHAPE, the layout is not this module's, or the vector is not of that layout.
    """
    check_layout(layout_of(module), layout)
    check_vector(layout, flat)
    trained, others = state_tensors(module)
    named = layout.unflatten(flat)
    with torch.no_grad():
        for name, tensor in {**trained, **others}.items():
            tensor.copy_(torch.tensor(named[name]))


def check_layout(own: Layout, given: Layout) -> None:
    """Refuse a layout that is not the module's own."""
    if own.digest == given.digest:
        return
    ours, theirs = {s.name: s.shape for s in own.slots}, {s.name: s.shape for s in given.slots}
    differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    first = (
        f"{differing[0]!r} is {ours.get(differing[0])} here, {theirs.get(differing[0])} there"
        if differing
        else ("the order differs")
    )
    raise UpdateRejected(
        Rejection.WRONG_SHAPE,
        f"The model has {own.size} coordinates in another layout than the {given.size} given: {first}.",
        hint="Device and coordinator run different versions of the task.",
    )


def check_vector(layout: Layout, flat: Vector) -> None:
    """Refuse a vector that is not a float32 vector of this layout."""
    if flat.shape != (layout.size,) or flat.dtype != "float32":
        raise UpdateRejected(
            Rejection.WRONG_SHAPE,
            f"The model vector is {flat.dtype}{flat.shape}, expected float32{(layout.size,)}.",
            hint="Device and coordinator run different versions of the task.",
        )
