"""The protected weights of each tensor: where they are, what they are worth, and what an adapter adds to them.

Input: a model, wrapped as it may be, and a selection. Output: name -> `Held` for the tensors that training can
change. Nothing here changes a weight.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from safelocus.distributed import local
from safelocus.errors import TrainingError
from safelocus.preservation.lora import LoraUpdate, lora_updates, trained_copies
from safelocus.selection import Selection
from safelocus.sparse import Site, selected_parameters, sites


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

    def original(self) -> Tensor:
        """What the tensor must hold where no adapter is added."""
        return self.values

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


def hold(model: nn.Module, selection: Selection) -> tuple[dict[str, Held], dict[str, nn.Parameter]]:
    """Name -> what is held of each selected tensor that training can change, and name -> those that it cannot."""
    parameters = selected_parameters(model, selection)
    updates, copies = lora_updates(model, parameters), trained_copies(model)
    held, untrained = {}, {}
    for name, site in sites(model, selection).items():
        copy = copies.get(id(site.parameter))
        site = site if copy is None else replace(site, parameter=copy)
        if site.parameter.requires_grad or name in updates or copy is not None:
            held[name] = Held(
                site=site,
                values=site.read(),
                flat_index=site.index if site.position is None else selection[name][site.position.cpu()].to(site.index),
                update=updates.get(name),
            )
        else:
            untrained[name] = site.parameter
    if not held:
        raise TrainingError(
            f"none of the {len(untrained)} selected tensors is trained: they do not require gradients, and no adapter "
            f"changes them ({', '.join(list(untrained)[:3])}, ...). There is nothing to protect"
        )
    return held, untrained
