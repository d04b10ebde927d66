"""From text to what the methods need: token batches, block inputs, Hessians."""
