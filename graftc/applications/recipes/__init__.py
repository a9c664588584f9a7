"""Methods that take several trainings, run as one that can be resumed: `tune`, and the folder it keeps."""
