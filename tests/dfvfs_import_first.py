"""Imports each named dfVFS module first, in a child forked before anything was imported.

``dfvfs_import_first.py MODULE...`` prints one line per module that does not leave the back-end
active, with the reason. Warnings are errors.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings


def check(name: str) -> None:
    """Import ``name``, then look at every place where the back-end must be."""
    warnings.simplefilter("error")
    import importlib

    import qcow2_forensics_autoload

    qcow2_forensics_autoload.install()
    importlib.import_module(name)

    from dfvfs.credentials import manager as credentials
    from dfvfs.helpers import source_scanner, volume_scanner
    from dfvfs.lib import definitions
    from dfvfs.path import factory, qcow_path_spec
    from dfvfs.resolver_helpers import manager as helpers

    import dfvfs_qcow2
    import dfvfs_qcow2.path_spec

    assert dfvfs_qcow2.is_active(), "resolver helper"
    ours = dfvfs_qcow2.path_spec.QCOWPathSpec
    assert factory.Factory._path_spec_types["QCOW"] is ours, "path spec in the factory"
    assert qcow_path_spec.QCOWPathSpec is ours, "path spec in its module"
    stream = helpers.ResolverHelperManager.GetHelper("ENCODED_STREAM")
    assert type(stream).__module__ == "dfvfs_qcow2.resolver_helper", "encoded stream helper"
    assert credentials.CredentialsManager._credentials["QCOW"], "credentials"
    assert "QCOW" in definitions.TYPE_INDICATORS_WITH_ENCRYPTION_SUPPORT, "encryption support"
    assert source_scanner.SourceScanner.ScanForVolumeSystem.knows_qcow_snapshots, "source scanner"
    assert volume_scanner.VolumeScanner.GetBasePathSpecs.knows_qcow_snapshots, "volume scanner"


def main() -> int:
    for name in sys.argv[1:]:
        child = os.fork()
        if child == 0:
            try:
                check(name)
            except BaseException:  # noqa: BLE001 - passed on to the test
                sys.stdout.write(f"{name}: {traceback.format_exc(limit=-3)}\n")
                sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
