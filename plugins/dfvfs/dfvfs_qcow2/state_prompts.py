"""Questions of an attended scan: asked once for all states of an image, and saying which state they are about.

The scan of each snapshot asks what the scan of the active state asked: which partitions, which shadow copies,
which password. A state that has the same volumes gets the same answers; for one that has others the
question says which state it is about.
"""

from __future__ import annotations

from collections import Counter
from functools import partialmethod
from typing import Any

from qcow2_forensics.text import printable, sentence

_Question = tuple[object, ...]


class StatePrompts:
    """Stands in for the mediator of a volume scanner while several states are scanned."""

    def __init__(self, mediator: Any) -> None:
        self._mediator = mediator
        self._answers: dict[_Question, Any] = {}
        self._credentials: list[tuple[str, Any]] = []
        self._asked: Counter[_Question] = Counter()
        self._state = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mediator, name)

    def begin(self, state: str) -> None:
        """Ask about another state from here on."""
        self._state = state
        self._asked.clear()

    # The names below are those of dfVFS's and plaso's mediators.

    def PromptUserForVSSCurrentVolume(self) -> Any:  # noqa: N802
        return self._answer(("PromptUserForVSSCurrentVolume",))

    def UnlockEncryptedVolume(  # noqa: N802
        self, source_scanner: Any, scan_context: Any, locked_scan_node: Any, credentials: Any
    ) -> bool:
        """Try what opened a volume before, then ask; a volume that was skipped in a state before is skipped."""
        for kind, data in self._credentials:
            if kind in credentials.CREDENTIALS and source_scanner.Unlock(
                scan_context, locked_scan_node.path_spec, kind, data
            ):
                return True
        arguments = source_scanner, scan_context, locked_scan_node, credentials
        unlocked = bool(
            self._answer(("UnlockEncryptedVolume", locked_scan_node.type_indicator), *arguments, keep=False)
        )
        if unlocked:
            self._credentials.append(locked_scan_node.credential)
        return unlocked

    def _volumes(self, method: str, volume_system: Any, volume_identifiers: Any) -> Any:
        question = (method, volume_system.TYPE_INDICATOR, *volume_identifiers)
        answer = self._answer(question, volume_system, volume_identifiers)
        return list(answer) if isinstance(answer, list) else answer  # callers change the list they get

    GetAPFSVolumeIdentifiers = partialmethod(_volumes, "GetAPFSVolumeIdentifiers")
    GetLVMVolumeIdentifiers = partialmethod(_volumes, "GetLVMVolumeIdentifiers")
    GetPartitionIdentifiers = partialmethod(_volumes, "GetPartitionIdentifiers")
    GetVSSStoreIdentifiers = partialmethod(_volumes, "GetVSSStoreIdentifiers")
    GetVolumeIdentifiers = partialmethod(_volumes, "GetVolumeIdentifiers")
    GetVolumeSnapshotIdentifiers = partialmethod(_volumes, "GetVolumeSnapshotIdentifiers")

    def _answer(self, question: _Question, *arguments: Any, keep: bool = True) -> Any:
        """Return the answer to a question: the same question comes in the same order in every state."""
        self._asked[question] += 1
        question = (*question, self._asked[question])
        if question in self._answers:
            return self._answers[question]
        if self._state:
            self._mediator._output_writer.Write(f"\n{printable(sentence(self._state))}:\n\n")
        answer = getattr(self._mediator, str(question[0]))(*arguments)
        if keep or not answer:
            self._answers[question] = list(answer) if isinstance(answer, list) else answer
        return answer
