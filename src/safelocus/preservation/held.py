"""What is held of the selected weights: where they are now, what they are worth, and what an adapter adds to them.

A copy of the selected weights is kept in their own dtype, K x (bytes of a weight + 8 of its index; on the CPU the index
is the selection's own).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from safelocus import distributed
from safelocus.distributed import local
from safelocus.errors import TrainingError, some
from safelocus.preservation.lora import LoraUpdate, lora_updates, trained_copies
from safelocus.selection.selection import Selection
from safelocus.selection.sparse import Site, selected_parameters, sites


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """The protected weights of one tensor.

    Attributes:
        site: where they are, in this process.
        values: what they are worth: [k of this tensor], in its dtype, on its device.
        flat_index: [k] into the whole tensor; the site's own index unless the tensor is sharded.
        update: what an adapter adds to them in the forward pass.
    """

    site: Site
    values: Tensor
    flat_index: Tensor
    update: LoraUpdate | None = None

    def corrected(self) -> Tensor:
        """What the tensor must hold so that tensor and adapter sum up to the values; fp32 with an adapter."""
        if self.update is None or self.update.is_merged:
            return self.values
        added = self.update.at(self.flat_index)
        return self.values.to(torch.promote_types(self.values.dtype, added.dtype)) - added

    def parameters(self) -> list[nn.Parameter]:
        """Whatever must be trained for the weights to change."""
        return [self.site.parameter, *(self.update.parameters() if self.update else ())]

    def settled(self) -> "Held":
        """The same where the tensor is now: models are moved to a device after the protection began."""
        parameter = self.site.parameter
        device = local(parameter).device
        if self.values.device == device and self.values.dtype == parameter.dtype:
            return self
        site = replace(self.site, index=self.site.index.to(device))
        flat_index = site.index if site.position is None else self.flat_index.to(device)
        return replace(self, site=site, values=self.values.to(device, parameter.dtype), flat_index=flat_index)


def hold(
    model: nn.Module, selection: Selection, *, exact_gradient: bool = False, known: Mapping[str, Held] | None = None
) -> tuple[dict[str, Held], dict[str, nn.Parameter]]:
    """Name -> what is held of each selected tensor that training can change, and name -> those that it cannot.

    Args:
        known: what was held before, of the same selection: read again only where the parameter is another.

    Raises:
        TrainingError: training can change none, an adapter cannot be protected from, or has no exact gradient.
        SelectionError: the selection does not fit the model.
    """
    parameters = selected_parameters(model, selection)
    updates, copies = lora_updates(model, parameters), trained_copies(model)
    held, untrained = {}, {}
    for name, site in sites(model, selection).items():
        copy = copies.get(id(site.parameter))
        site = site if copy is None else replace(site, parameter=copy)
        old = (known or {}).get(name)
        if not (site.parameter.requires_grad or name in updates or copy is not None):
            untrained[name] = site.parameter
        elif old is not None and old.site.parameter is site.parameter:
            held[name] = replace(old, update=updates.get(name))
        else:
            held[name] = Held(
                site=site,
                values=site.read(),
                flat_index=site.index if site.position is None else selection[name][site.position.cpu()].to(site.index),
                update=updates.get(name),
            )
    if not held:
        raise TrainingError(
            f"none of the {len(untrained)} selected tensors is trained: they do not require gradients, and no adapter "
            f"changes them ({some(list(untrained), 3)}). There is nothing to protect"
        )
    for name, each in held.items():
        is_whole = each.site.position is None
        if exact_gradient and each.update is not None and not (is_whole and each.update.is_linear):
            raise TrainingError(
                f"{name}: exact_gradient is for whole Linear layers, not for experts (target_parameters) or shards. "
                "Leave it off: the effective weights keep their values all the same"
            )
    return held, untrained


def check_shards(held: Mapping[str, Held]) -> None:
    """Refuse shards that cannot be calibrated."""
    distributed.check_shards({name: each.site.parameter for name, each in held.items()})
    if any(each.update is not None and each.site.position is not None for each in held.values()):
        raise TrainingError(
            "calibration beside a LoRA adapter needs weights that are whole in each process; these are sharded. Train "
            "all weights, or copies of the model"
        )
