"""Write Programs to files, read them, and check them before use. May use `graftc.passes.core.ir`."""
