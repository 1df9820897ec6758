"""What DISSECT_PLUGINS may name where the import hook is switched off: it registers, and nothing else."""

from dissect_qcow2 import register

register()
