"""OpenRelik worker that audits QCOW2 images."""
