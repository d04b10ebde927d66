"""Where hf_spqr meets other libraries."""
