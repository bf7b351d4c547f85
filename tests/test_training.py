"Names that tests/test_howto.py imports from here, until it imports them from reference.py."
from reference import assert_counts, count_groups as groups, layers_of as layers, zero_masks  # noqa: F401
