"""The methods: one file of mathematics each, on the shared primitives. They never import each other."""
