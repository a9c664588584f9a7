"""Programs in files: write, read, and check them before use. May use `graftc.passes.core.ir`."""
