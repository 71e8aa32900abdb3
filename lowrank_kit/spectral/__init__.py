"""Pure functions on tensors that every method stands on.

Streamed second moments (`moments`), eigen- and singular decompositions with declared rank and sign policies
(`decompose`), spectrum metrics (`metrics`), first-order attribution (`attribution`) and budgeted rank
allocation (`allocate`). Nothing here knows a model, a configuration or a file.
"""
