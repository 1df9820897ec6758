"""``--archives qcow``: QCOW images in a file system are processed with what is in them, as plaso does for VHD.

Each of them is audited, as the source is: what is found are warnings with the parser ``qcow2``.
An image can map its own clusters, so that its guest has a file that is the image itself, as often as it has
names: images are processed a few inside each other, and a number by each worker.
"""

from __future__ import annotations

from typing import Any

from dfvfs.lib import definitions as dfvfs_definitions
from dfvfs.lib import errors as dfvfs_errors
from dfvfs.path import factory
from plaso.containers import event_sources
from plaso.engine import worker as stock
from plaso.lib import definitions

from .audit_notes import PARSER, audit_sentences
from .names import ARCHIVE, qcow_path_specs
from .sources import begins_as_image
from .volume_scanner import Request, base_path_specs
from .wrapping import wrap_method

_DEPTH = 3  # images inside each other, the source among them where it is one
_IMAGES = 1000  # inside others, processed by one worker; a hypervisor has some hundreds


def _extract_content(stock_method: Any, worker: Any, mediator: Any, file_entry: Any, stream_name: Any) -> None:
    """Process an image in place of the parsers: they know nothing of its bytes."""
    if ARCHIVE not in worker._archive_types or not _is_image(file_entry, stream_name):
        stock_method(worker, mediator, file_entry, stream_name)
        return
    properties = factory.Factory.GetProperties(file_entry.path_spec)
    if stream_name:
        properties["data_stream"] = stream_name
    path_spec = factory.Factory.NewPathSpec(file_entry.type_indicator, parent=file_entry.path_spec.parent, **properties)
    qcow = factory.Factory.NewPathSpec("QCOW", parent=path_spec)
    done = worker.__dict__.setdefault("_qcow_images", 0)  # by this worker
    if len(list(qcow_path_specs(path_spec))) >= _DEPTH:  # those it is inside of
        mediator.ProduceWarning(f"not processed: it is inside {_DEPTH} images; export it to process it", path_spec=qcow)
    elif done >= _IMAGES:
        mediator.ProduceWarning(f"not processed: more than {_IMAGES} images inside others", path_spec=qcow)
    else:
        worker._qcow_images += 1
        worker.processing_status = definitions.STATUS_INDICATOR_COLLECTING
        _process_image(worker, mediator, qcow)


def _is_image(file_entry: Any, stream_name: Any) -> bool:
    return begins_as_image(lambda: file_entry.GetFileObject(data_stream_name=stream_name or ""))


def _process_image(worker: Any, mediator: Any, qcow: Any) -> None:
    request = Request(option="--qcow_snapshots all")
    scanner = stock.EventExtractionWorkerVolumeScanner(mediator=_Unattended(request))
    try:
        for path_spec in _scan(scanner, qcow, request):
            if worker._abort:
                return
            mediator.ProduceEventSource(
                event_sources.EventSource(file_entry_type=dfvfs_definitions.FILE_ENTRY_TYPE_FILE, path_spec=path_spec)
            )
    except (OSError, RuntimeError, dfvfs_errors.Error) as error:
        mediator.ProduceWarning(f"unable to process storage media image with error: {error!s}", path_spec=qcow)
    for notice in request.notices:
        mediator.ProduceWarning(notice, path_spec=qcow)
    _audit(mediator, qcow)


def _audit(mediator: Any, qcow: Any) -> None:
    mediator.AppendToParserChain(PARSER)
    try:
        for sentence in audit_sentences(qcow)[0]:
            mediator.ProduceWarning(sentence, path_spec=qcow)
    finally:
        mediator.PopFromParserChain()


class _Unattended:
    """Answers for the user where a volume in an image is locked: it stays locked, with a warning, and the scan goes on."""

    def __init__(self, request: Request) -> None:
        self._notices = request.notices
        self._output_writer = self  # for what StatePrompts writes before a question

    # The names below are those of plaso's mediator and of its output writer.

    def UnlockEncryptedVolume(self, _scanner: Any, _scan_context: Any, node: Any, _credentials: Any) -> bool:  # noqa: N802
        """Leave the volume locked."""
        kind = node.type_indicator
        self._notices.append(
            f"A volume ({kind}) is locked: credentials are not tried inside images, and its files are not processed."
        )
        return False

    def Write(self, text: str) -> None:  # noqa: N802
        """Print nothing: workers have no terminal."""


def _scan(scanner: Any, qcow: Any, request: Request) -> list[Any]:
    options = stock.dfvfs_volume_scanner.VolumeScannerOptions()
    options.partitions, options.volumes, options.snapshots = ["all"], ["all"], ["none"]
    found = base_path_specs(scanner, lambda: scanner._ScanSourcePathSpec(qcow), options, request, is_inside=True)
    found = [item for item in found if item.comparable != qcow.comparable]
    if not found:
        request.notices.append("Nothing in the image is processed: no file system was found, or it is locked.")
    return found


wrap_method(stock.EventExtractionWorker, "_ExtractContentFromDataStream", _extract_content)
