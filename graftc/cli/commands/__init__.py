"""The commands, one file for each, named after it. `graftc.cli.app` lists them; help and listings import no torch."""
