"""Running experiments: config -> train(config, workdir) -> results."""
