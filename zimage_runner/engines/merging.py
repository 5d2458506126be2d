"""Adapters merged into the weights of loaded components, and taken out again by putting back what was there.

One function for all engines: an engine says where each published tensor lies in its modules (``Slot``). Changed tensors
are computed from the originals, never from what another adapter left, in float32, and rounded once; they are written
in place, so that recorded graphs and compiled code see them.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zimage_runner.engines.originals import Originals
from zimage_runner.errors import RunStopped, UserError
from zimage_runner.weights.adapters.adapter import Adapter, Delta
from zimage_runner.weights.adapters.reader import read_adapter
from zimage_runner.weights.find.verify import file_digests

if TYPE_CHECKING:
    import torch

    from zimage_runner.sampling import Lora

log = logging.getLogger(__name__)

KEPT_FILES = 4e9
"""Bytes of adapter files that are kept in memory after their use: sweeps come back to the same ones."""

Step = tuple[Delta, float]
"""A change and its strength."""


class Slot:
    """Where a published tensor lies in a loaded component: some rows of a parameter, or all of it."""

    def __init__(self, owner: torch.nn.Module, leaf: str, begin: int = 0, rows: int | None = None) -> None:
        self.owner, self._leaf = owner, leaf
        self._rows = slice(begin, None if rows is None else begin + rows)

    def stored(self) -> tuple[torch.Tensor, ...]:
        """What the component computes with, as views of its own memory."""
        return (self.view(self._leaf),)

    def to_keep(self) -> tuple[torch.Tensor, ...]:
        """What is needed to merge, and to put back, once this is changed. The tensors may be views."""
        return self.stored()

    def original(self, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        """The weight to merge into, given what ``to_keep`` gave."""
        return kept[0]

    def put_back(self, kept: Sequence[torch.Tensor]) -> None:
        """Have in its place, bit for bit, what was there when ``to_keep`` gave this."""
        self.fill(kept)

    def write(self, value: torch.Tensor) -> None:
        """Put a float32 weight in its place, rounded to what is stored."""
        self.fill((value,))

    def fill(self, values: Sequence[torch.Tensor]) -> None:
        """Copy these into what is stored."""
        for place, value in zip(self.stored(), values, strict=True):
            # Weights in host memory travel on other streams, which do not wait for this one.
            place.copy_(value.reshape(place.shape), non_blocking=place.is_cuda)

    def view(self, leaf: str) -> torch.Tensor:
        """This slot's rows of a parameter of its module, wherever the parameter's memory is now."""
        parameter = self.owner._parameters[leaf]
        assert parameter is not None
        return parameter.data[self._rows]


class Component:
    """A loaded component whose weights adapters can change."""

    def __init__(
        self,
        name: str,
        slots: Mapping[str, Slot],
        device: torch.device,
        *,
        unused: Callable[[str], bool] = lambda tensor: False,
        about_to_change: Callable[[], None] = lambda: None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """``slots``: by published names. ``unused``: tensors that exist, and that nothing here computes with.

        ``about_to_change`` and ``changed`` are called around every change of weights.
        """
        self.name = name
        self.device = device
        self.originals = Originals(device)
        self._slots = slots
        self._unused = unused
        self._about_to_change, self._has_changed = about_to_change, changed
        self._merged: set[str] = set()
        """Tensors that are not what they were."""

    @property
    def is_changed(self) -> bool:
        """Whether a tensor is, or may be, not what it was when the component was loaded."""
        return bool(self._merged)

    def merge(self, adapters: Iterable[tuple[Adapter, float]]) -> None:
        """Change every tensor as these adapters do, one after another, and put back all others that were changed."""
        import torch

        steps = [(delta, strength) for adapter, strength in adapters for delta in adapter.of(self.name)]
        steps = [step for step in steps if not all(map(self._unused, step[0].tensors))]
        wanted = dict.fromkeys(name for delta, _ in steps for name in delta.tensors)
        if missing := next((name for name in wanted if name not in self._slots), None):
            raise UserError(f"this {self.name} has no {missing} that an adapter could change")
        self._about_to_change()
        with torch.inference_mode():
            for name in wanted:
                self.originals.keep(name, self._slots[name].to_keep)
            for name in self._merged - set(wanted):
                self._slots[name].put_back(self.originals.of(name))
            self._merged = set(wanted)  # before it is true: who fails on the way begins anew
            for group in together(steps):
                self._change(group)
        self._has_changed()

    def _change(self, steps: Sequence[Step]) -> None:
        """Write the tensors of changes that have tensors in common."""
        import torch

        values = {name: self._original(name) for delta, _ in steps for name in delta.tensors}
        for delta, strength in steps:
            parts = [values[name] for name in delta.tensors]
            whole = delta.change.apply(parts[0] if len(parts) == 1 else torch.cat(parts), strength)
            values.update(zip(delta.tensors, whole.split([len(part) for part in parts]), strict=True))
        for name, value in values.items():
            self._slots[name].write(value)

    def _original(self, name: str) -> torch.Tensor:
        return self._slots[name].original(self.originals.of(name)).to(self.device, non_blocking=True).float()


def together(steps: Sequence[Step]) -> list[list[Step]]:
    """Changes in groups that have no tensor in common, each in its order."""
    group_of: dict[str, int] = {}
    for number, (delta, _) in enumerate(steps):
        known = {group_of[name] for name in delta.tensors if name in group_of}
        group_of.update(dict.fromkeys(delta.tensors, number))
        if known:
            group_of.update({name: number for name, group in group_of.items() if group in known})
    groups: dict[int, list[Step]] = {}
    for step in steps:
        groups.setdefault(group_of[step[0].tensors[0]], []).append(step)
    return list(groups.values())


class Adapters:
    """The adapters that an engine draws with, kept in step with the components that it has loaded."""

    def __init__(self) -> None:
        self._wanted: tuple[Lora, ...] = ()
        self._components: dict[str, Component] = {}
        self._settled: dict[str, tuple[Lora, ...]] = {}
        """What each component's weights are merged with, of all that is wanted."""
        self._files: OrderedDict[str, Adapter] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def want(self, loras: Sequence[Lora]) -> bool:
        """Draw with these and no others from now on. Return whether weights changed."""
        self._wanted = tuple(loras)
        return self._settle()

    def attach(self, component: Component) -> None:
        """Merge what is wanted into a component that was just loaded."""
        self._components[component.name] = component
        self._settled[component.name] = ()
        self._settle()

    def detach(self, name: str) -> None:
        """Forget a component, which is being freed, and its originals."""
        self._components.pop(name, None)

    def free_memory(self) -> bool:
        """Move originals from the GPU to the host. Return whether there were any."""
        moved = [component.originals.to_host() for component in self._components.values()]
        return any(moved)

    def _settle(self) -> bool:
        changed = False
        for name, component in self._components.items():
            if self._settled.get(name) == self._wanted:
                continue
            steps = [(self._read(lora), lora.weight) for lora in self._wanted]
            steps = [(adapter, weight) for adapter, weight in steps if adapter.of(name)]
            if steps or component.is_changed:
                began = time.perf_counter()
                self._settled.pop(name, None)  # a merge that fails is made again
                component.merge(steps)
                log.debug("%s: %d adapters merged in %.3f s", name, len(steps), time.perf_counter() - began)
                changed = True
            self._settled[name] = self._wanted
        return changed

    def _read(self, lora: Lora) -> Adapter:
        """The adapter's changes, from memory if it was used lately. Raises RunStopped if its file is another now."""
        if lora.digest not in self._files:
            path = Path(lora.path).expanduser()
            try:
                same = file_digests([path])[0].sha256 == lora.digest
                size = path.stat().st_size
            except OSError as error:
                raise RunStopped(f"{lora.path} cannot be read any more: {error.strerror}") from error
            if not same:
                raise RunStopped(f"{lora.path} has changed since this run was planned: put it back, and resume")
            self._files[lora.digest], self._sizes[lora.digest] = read_adapter(path), size
            while len(self._files) > 1 and sum(self._sizes[digest] for digest in self._files) > KEPT_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(lora.digest)
        return self._files[lora.digest]
