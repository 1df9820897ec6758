"""The Celery task: OpenRelik's files and options in, its files and report out."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from openrelik_worker_common.file_utils import create_output_file
from openrelik_worker_common.reporting import MarkdownTable, Priority, Report
from openrelik_worker_common.task_utils import create_task_result, get_input_files

from qcow2_forensics import Severity
from qcow2_forensics.text import printable

from .app import celery
from .work import DEPTHS, Result, Written, examine

TASK_NAME = "openrelik-worker-qcow2.tasks.audit"
TASK_METADATA = {
    "display_name": "QCOW2 audit",
    "description": "Integrity, hidden and residual data, references and provenance of QCOW2 images",
    "task_config": [
        {
            "name": "depth",
            "label": "Depth",
            "description": "triage reads headers, standard all tables, deep free space and slack too",
            "type": "select",
            "items": list(DEPTHS),
            "required": False,
        },
        {
            "name": "carve",
            "label": "Write out residue",
            "description": "Pass leaked, free and hidden data on as files (up to 1 GiB an image)",
            "type": "checkbox",
            "required": False,
        },
    ],
}
COMPATIBLE_INPUTS = {
    "data_types": [],
    "mime_types": ["application/x-qemu-disk"],
    "filenames": ["*.qcow2", "*.qcow", "*.qcow2c", "*.img", "*.snap"],
}
_PRIORITIES = {
    Severity.CRITICAL: Priority.CRITICAL,
    Severity.HIGH: Priority.HIGH,
    Severity.MEDIUM: Priority.MEDIUM,
    Severity.LOW: Priority.LOW,
}


@celery.task(bind=True, name=TASK_NAME, metadata=TASK_METADATA)
def audit(
    self: Any,  # noqa: ARG001 - the task itself, as bind=True has it
    pipe_result: str | None = None,
    input_files: list[dict[str, Any]] | None = None,
    output_path: str = "",
    workflow_id: str = "",
    task_config: dict[str, Any] | None = None,
) -> str:
    """Audit every image among the input files and return OpenRelik's result."""
    options = task_config or {}
    outputs: list[dict[str, Any]] = []
    results: list[tuple[str, Result]] = []
    for item in get_input_files(pipe_result, input_files or [], filter=COMPATIBLE_INPUTS):
        name = item.get("display_name") or Path(item["path"]).name
        with tempfile.TemporaryDirectory(dir=output_path) as folder:
            result = examine(
                Path(item["path"]),
                name,
                Path(folder),
                depth=_first(options.get("depth")),
                carve=bool(options.get("carve")),
            )
            outputs += [_kept(made, output_path, item.get("id")) for made in (*result.files, *result.residue)]
        results.append((name, result))
    return create_task_result(
        output_files=outputs,
        workflow_id=workflow_id,
        command="qcow2-forensics audit",
        meta={"images": len(results)},
        task_report=_report(results).to_dict(),
    )


def _first(value: Any) -> str:
    # A select gives one value or a list of them.
    return str(value[0] if isinstance(value, list) and value else value or "standard")


def _kept(made: Written, output_path: str, source: int | None) -> dict[str, Any]:
    output = create_output_file(
        output_path, display_name=made.display_name, data_type=made.data_type, source_file_id=source
    )
    shutil.move(made.path, output.path)
    kept: dict[str, Any] = output.to_dict()
    return kept


def _report(results: list[tuple[str, Result]]) -> Report:
    report = Report("QCOW2 audit")
    worst = max((result.report.worst for _, result in results if result.report.worst is not None), default=None)
    report.priority = _PRIORITIES.get(worst, Priority.INFO) if worst is not None else Priority.INFO
    report.summary = f"{len(results)} images audited, worst finding: {worst.label if worst is not None else 'none'}"
    for name, result in results:
        section = report.add_section()
        section.add_header(_markdown(name), level=2)
        section.add_paragraph(_markdown(result.error or result.summary))
        table = MarkdownTable(["Severity", "Code", "Finding"])
        for finding in result.report.at_least(Severity.LOW):
            table.add_row([finding.severity.label, finding.code, _markdown(finding.title)])
        section.add_table(table)
    return report


def _markdown(text: str) -> str:
    """Return text from evidence so that it is text in Markdown and HTML too."""
    shown = printable(text, 200)
    for character in "\\`*_{}[]()#+!|<>&":
        shown = shown.replace(character, f"&#{ord(character)};" if character != "&" else character)
    return shown
