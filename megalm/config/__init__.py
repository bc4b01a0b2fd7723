"""What a run is: the schema, the strict parser, and the rules that a config must satisfy."""
