"""Programs in files: written, read, and looked at before anything is made of them. May use `graftc.passes.core.ir`."""
