"""The plugin ``qcow2.changes.Changes``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from volatility3.framework import contexts, exceptions, interfaces, renderers
from volatility3.framework import plugins as construction
from volatility3.framework.automagic import available, choose_automagic
from volatility3.framework.configuration import requirements
from volatility3.framework.renderers import format_hints

from . import common, layers, linux_kernel, ram
from .evidence import Row
from .options import optional_text

# By operating system; the names are prefixes, as ``vol`` accepts them. What a Volatility lacks is passed over.
_DEFAULT = {
    "linux": (
        "linux.pslist.PsList",
        "linux.lsmod.Lsmod",
        "linux.sockstat.Sockstat",
        "linux.mountinfo.MountInfo",
        "linux.malware.check_syscall.Check_syscall",
        "linux.malware.hidden_modules.Hidden_modules",
        "linux.bash.Bash",
    ),
    "windows": (
        "windows.pslist.PsList",
        "windows.modules.Modules",
        "windows.netscan.NetScan",
        "windows.ssdt.SSDT",
        "windows.svcscan.SvcScan",
        "windows.cmdline.CmdLine",
    ),
}

# Columns that name what a row is about, by plugin; rows with the same ones are one thing that changed.
_KEYS = {
    "linux.pslist": ("OFFSET (V)", "PID", "TID"),
    "linux.lsmod": ("Offset",),
    "linux.sockstat": ("NetNS", "Process Name", "PID", "TID", "FD", "Sock Offset"),
    "linux.mountinfo": ("MNT_NS_ID", "MOUNT ID"),
    "linux.malware.check_syscall": ("Table Name", "Index"),
    "windows.pslist": ("Offset(V)", "PID"),
    "windows.modules": ("Offset", "Base"),
    "windows.netscan": ("Offset",),
    "windows.ssdt": ("Index",),
    "windows.svcscan": ("Offset", "Order"),
    "windows.cmdline": ("PID",),
}

Values = tuple[str, ...]
Layer = TypeVar("Layer")


class KernelMemory(NamedTuple):
    """A memory ready for plugins: its kernel module in a context."""

    context: interfaces.context.ContextInterface
    module: str


class Table(NamedTuple):
    """What a plugin printed: the names of its columns, and rows of words."""

    columns: Values
    rows: list[Values]


class Changes(interfaces.plugins.PluginInterface):
    """Runs plugins on two memory snapshots of a QCOW2 image and shows the rows that appeared, vanished or changed.

    The later state is the one that --qcow2-snapshot names (the latest by default), the earlier one that --against names (the
    memory snapshot before it by default).
    """

    _required_framework_version = (2, 0, 0)
    _version = (1, 0, 0)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        return [
            requirements.ModuleRequirement(
                name="kernel", description="Kernel of the later state", architectures=["Intel32", "Intel64"]
            ),
            optional_text("against", "The earlier snapshot: its ID or name"),
            requirements.ListRequirement(
                name="plugins",
                element_type=str,
                description="The plugins to run, instead of a default set for the operating system",
                optional=True,
                default=[],
            ),
        ]

    def run(self) -> Any:
        columns = [("Change", str), ("Plugin", str), ("Row", str), ("Changed", str)]
        return renderers.TreeGrid(columns, self._rows())

    def _rows(self) -> Iterator[Row]:
        from qcow2_forensics import Qcow2Error
        from qcow2_forensics.text import printable

        try:
            later = KernelMemory(self.context, self.config["kernel"])
            earlier = self._earlier(later)
        except (Qcow2Error, exceptions.VolatilityException) as error:
            common.warn(f"the states cannot be compared: {printable(str(error))}")
            return
        for state in (earlier, later):
            _drop_working_tables(state.context)
        for name, kind in self._plugins(later):
            try:
                before, after = self._table(earlier, kind), self._table(later, kind)
            except Exception as error:  # noqa: BLE001 - a plugin may raise anything; the others go on
                common.warn(f"{name} is left out: {type(error).__name__}: {printable(str(error))}")
                continue
            for change, row, changed in compared(before, after, _keys(name)):
                yield 0, (change, name, row, changed)

    # --- the two states ------------------------------------------------------------------------

    def _earlier(self, later: KernelMemory) -> KernelMemory:
        """Return the earlier state: over the same file and, where the kernel is the same, with the same symbols."""
        from qcow2_forensics import Qcow2Error, memory_before, open_image

        state = _layer_of(later, layers.Qcow2VmStateLayer)
        if state is None:
            raise Qcow2Error("the memory is not of a snapshot of a QCOW2 image")
        file = common.LayerSource(self.context.layers[state.config["base_layer"]])
        image = open_image(common.image_source(file, state.config.get("assume", None)))
        wanted = self.config.get("against", None)
        entry = memory_before(image, state.view.snapshot, wanted)
        name = wanted or f"index:{entry.index}"
        return self._with_the_same_symbols(later, state, name) or self._anew(state, name)

    def _with_the_same_symbols(
        self, later: KernelMemory, state: layers.Qcow2VmStateLayer, name: str
    ) -> KernelMemory | None:
        """Return the earlier state when it is a Linux with the kernel of the later one; None for anything else."""
        if _system(self.context, later.module) != "linux":
            return None
        module = self.context.modules[later.module]
        paged = self.context.layers[module.layer_name]
        place = module.get_symbol("linux_banner").address
        banner = paged.read(place + module.offset, 256, pad=True).partition(b"\0")[0]
        memory = self._memory(later, state, name)
        symbols = linux_kernel.addresses(self.context.symbol_space[module.symbol_table_name].config["isf_url"])
        found = linux_kernel.place(memory.view, banner, symbols) or self._searched(module, type(paged), memory.name)
        if found is None:
            return None
        kind, settings = found
        path = common.configure(
            self.context, self.config_path, "earlier", "layer_name", memory_layer=memory.name, **settings
        )
        layer = kind(self.context, path, self.context.layers.free_layer_name("Earlier"), {"os": "Linux"})
        self.context.layers.add_layer(layer)
        shift = settings["kernel_virtual_offset"]
        if not banner or layer.read(place + shift, 256, pad=True).partition(b"\0")[0] != banner:
            return None
        earlier = contexts.Module.create(
            self.context,
            "earlier",
            layer.name,
            shift,
            symbol_table_name=module.symbol_table_name,
            native_layer_name=layer.name,
        )
        return KernelMemory(self.context, earlier.name)

    def _searched(self, module: Any, kind: Any, memory: str) -> tuple[Any, dict[str, Any]] | None:
        """Return kind and settings of the kernel's address space as Volatility's scan finds them."""
        from volatility3.framework.automagic import linux

        top = next((item for item in ("init_top_pgt", "init_level4_pgt") if module.has_symbol(item)), None)
        if top is None:
            return None
        shift, virtual_shift = linux.LinuxIntelStacker.find_aslr(self.context, module.symbol_table_name, memory)
        root = linux.LinuxIntelStacker.virtual_to_physical_address(module.get_symbol(top).address + shift)
        return kind, {"page_map_offset": root, "kernel_virtual_offset": virtual_shift}

    def _memory(self, later: KernelMemory, state: layers.Qcow2VmStateLayer, snapshot: str) -> Any:
        """Return the memory of another snapshot, read as the later one is: with its header fields and its layout."""
        memory = _layer_of(later, ram.QemuRamLayer)
        below, layer = state.config["base_layer"], None
        for kind, settings in (
            (layers.Qcow2VmStateLayer, {"snapshot": snapshot, "assume": state.config.get("assume", None)}),
            (ram.QemuRamLayer, {"layout": memory and memory.config.get("layout", None)}),
        ):
            path = common.configure(
                self.context, self.config_path, "earlier", kind.__name__, base_layer=below, **settings
            )
            layer = kind(self.context, path, self.context.layers.free_layer_name(kind.__name__))
            self.context.layers.add_layer(layer)
            below = layer.name
        return layer

    def _anew(self, state: layers.Qcow2VmStateLayer, snapshot: str) -> KernelMemory:
        """Return the earlier state as ``vol`` itself would find it, with symbols of its own."""
        context = contexts.Context()
        for key in self.context.config:
            if key.startswith("automagic.") and not key.startswith("automagic.LayerStacker.stack"):
                context.config[key] = self.context.config[key]
        context.config["automagic.LayerStacker.single_location"] = common.LayerSource(
            self.context.layers[state.config["base_layer"]]
        ).location
        context.config["automagic.Qcow2Options.qcow2_snapshot"] = snapshot
        magic = choose_automagic(available(context), type(self))
        probe = construction.construct_plugin(context, magic, type(self), "plugins", self._progress_callback, self.open)
        return KernelMemory(context, probe.config["kernel"])

    # --- the plugins ---------------------------------------------------------------------------

    def _plugins(self, state: KernelMemory) -> Iterator[tuple[str, type[interfaces.plugins.PluginInterface]]]:
        from volatility3 import framework

        known = framework.list_plugins()
        system = _system(state.context, state.module)
        named = self.config.get("plugins", None)
        for wanted in named or _DEFAULT.get(system, ()):
            found = [name for name in known if name == wanted] or [name for name in known if name.startswith(wanted)]
            if len(found) == 1:
                yield found[0], known[found[0]]
            elif named:
                common.warn(f"{wanted!r} is {'no plugin' if not found else 'the start of several plugins'}")

    def _table(self, state: KernelMemory, kind: type[interfaces.plugins.PluginInterface]) -> Table:
        """Run a plugin on a state."""
        path = interfaces.configuration.path_join(self.config_path, "run", kind.__module__.replace(".", "_"))
        module = state.context.modules[state.module]
        for requirement in kind.get_requirements():
            key = interfaces.configuration.path_join(path, requirement.name)
            if isinstance(requirement, requirements.ModuleRequirement):
                state.context.config[key] = state.module
            elif isinstance(requirement, requirements.TranslationLayerRequirement):
                state.context.config[key] = module.layer_name
            elif isinstance(requirement, requirements.SymbolTableRequirement):
                state.context.config[key] = module.symbol_table_name
            elif requirement.default is not None:
                state.context.config[key] = requirement.default
        tables = set(state.context.symbol_space)
        plugin = kind(state.context, path, progress_callback=self._progress_callback)
        plugin.set_open_method(self.open)
        grid = plugin.run()
        rows: list[Values] = []

        def keep(node: interfaces.renderers.TreeNode, _: None) -> None:
            rows.append(tuple(_word(value) for value in node.values))

        try:
            grid.populate(keep, None)
        finally:
            for added in set(state.context.symbol_space) - tables:
                state.context.symbol_space.remove(added)  # one without a producer makes other plugins fail
        return Table(tuple(column.name for column in grid.columns), rows)


def _layer_of(state: KernelMemory, kind: type[Layer]) -> Layer | None:
    """Return the layer of a kind that a state is read through, None without one."""
    waiting = [state.context.modules[state.module].layer_name]
    while waiting:
        layer = state.context.layers[waiting.pop()]
        if isinstance(layer, kind):
            return layer
        waiting += layer.dependencies
    return None


def _drop_working_tables(context: interfaces.context.ContextInterface) -> None:
    """Remove tables that automagic left and that name no producer: where there is one, hidden_modules and kmsg fail."""
    for name in tuple(context.symbol_space):
        if not hasattr(context.symbol_space[name], "producer"):
            context.symbol_space.remove(name)


def _system(context: interfaces.context.ContextInterface, module: str) -> str:
    """Return the operating system of a kernel by a symbol that no other has, "" when it is none we know."""
    known = (("linux", "linux_banner"), ("windows", "PsActiveProcessHead"))
    return next((name for name, symbol in known if context.modules[module].has_symbol(symbol)), "")


def _word(value: Any) -> str:
    if isinstance(value, interfaces.renderers.BaseAbsentValue):
        return "-"
    if isinstance(value, format_hints.Hex):
        return f"{value:#x}"
    return str(value)


def _keys(name: str) -> Values:
    return next((keys for prefix, keys in _KEYS.items() if name.startswith(prefix)), ())


def compared(before: Table, after: Table, keys: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield ``(change, row, changed columns)`` of the rows that are in one table only, in the order of the tables.

    ``keys`` are columns that name what a row is about: a pair of rows that agree in them is one that changed.
    """
    lost, came = Counter(before.rows), Counter(after.rows)
    vanished, appeared = lost - came, came - lost
    places = [before.columns.index(key) for key in keys if key in before.columns]
    same_shape = bool(places) and before.columns == after.columns
    old = {tuple(row[place] for place in places): row for row in vanished} if same_shape else {}
    paired = set()
    for row in _in_order(after.rows, appeared):
        former = old.get(tuple(row[place] for place in places)) if same_shape else None
        if former is None or former in paired:
            yield "appeared", _shown(after.columns, row), ""
            continue
        paired.add(former)
        changes = [
            f"{name}: {was} -> {now}" for name, was, now in zip(after.columns, former, row, strict=True) if was != now
        ]
        yield "changed", _shown(after.columns, row), "; ".join(changes)
    for row in _in_order(before.rows, vanished):
        if row not in paired:
            yield "vanished", _shown(before.columns, row), ""


def _in_order(rows: Iterable[Values], counts: Counter[Values]) -> Iterator[Values]:
    left = Counter(counts)
    for row in rows:
        if left[row]:
            left[row] -= 1
            yield row


def _shown(columns: Values, row: Values) -> str:
    from qcow2_forensics.text import printable

    return "; ".join(f"{name}={printable(value)}" for name, value in zip(columns, row, strict=True) if value != "-")
