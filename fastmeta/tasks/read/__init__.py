"""Ways in for data of one's own: folders of pictures, arrays, data sets of other libraries, and tables."""

from fastmeta.tasks.read._columns import Columns, is_missing, read_columns
from fastmeta.tasks.read._pictures import suffixes as picture_suffixes
from fastmeta.tasks.read._warning import DataWarning
from fastmeta.tasks.read.arrays import array_file, arrays
from fastmeta.tasks.read.dataset import dataset
from fastmeta.tasks.read.features import Features
from fastmeta.tasks.read.folder import folder, pictures
from fastmeta.tasks.read.open_data import Data, open_data
from fastmeta.tasks.read.spec import FORMS, Spec, is_form, moved, parse, quoted, with_options
from fastmeta.tasks.read.splits import Splits, names_in_files, names_in_table, split_examples
from fastmeta.tasks.read.table import Table, table

__all__ = [
    "FORMS",
    "Columns",
    "Data",
    "DataWarning",
    "Features",
    "Spec",
    "Splits",
    "Table",
    "array_file",
    "arrays",
    "dataset",
    "folder",
    "is_form",
    "is_missing",
    "moved",
    "names_in_files",
    "names_in_table",
    "open_data",
    "parse",
    "picture_suffixes",
    "pictures",
    "quoted",
    "read_columns",
    "split_examples",
    "table",
    "with_options",
]
