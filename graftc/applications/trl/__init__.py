"""TRL's command line over compiled models: its configs, its scripts and its trainers, with graftc in place of PEFT."""
