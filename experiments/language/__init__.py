"""The parts of the language model: the network, its contenders, training, sampling, the report."""
