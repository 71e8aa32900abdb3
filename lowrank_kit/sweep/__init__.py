"""Many configurations as one piece of work: started here or by a queue, summed up, searched over."""
