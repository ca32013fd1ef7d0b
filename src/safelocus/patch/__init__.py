"""Patches: new values at a selection's coordinates, for models in memory and in folders; see `patch` and `folder`."""

from safelocus.patch.difference import diff
from safelocus.patch.folder import apply_to_folder, revert_folder
from safelocus.patch.merging import merge
from safelocus.patch.patch import Patch
from safelocus.patch.state import Outcome

__all__ = ["Outcome", "Patch", "apply_to_folder", "diff", "merge", "revert_folder"]
