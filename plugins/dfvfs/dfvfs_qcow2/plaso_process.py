"""A worker process of log2timeline unlocks what a path specification leads through before it is opened."""

from plaso.multi_process import extraction_process as stock

from .plaso_credentials import process_path_spec
from .wrapping import wrap_method

wrap_method(stock.ExtractionWorkerProcess, "_ProcessPathSpec", process_path_spec)
