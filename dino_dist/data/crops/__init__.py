"""The views of a batch: what is drawn, and how it is rendered on a CPU or an accelerator."""
