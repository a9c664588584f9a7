"""Programs in files: written, read, and checked before anything is made of them. May use `graftc.passes.core.ir`."""
