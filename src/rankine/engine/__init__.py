"""The parts of the main job; `pipeline` reads them in order."""
