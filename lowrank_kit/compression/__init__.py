"""From a compressor's settings to a compressed model: decompose once, plan, factorise, measure."""
