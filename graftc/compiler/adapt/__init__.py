"""The passes that adapt a captured Program; `graftc.compiler.adapting` has their order."""
