"""What `doctor` is made of, in the order of its work: walk, values, readings, suspects, pairs, traps, diagnosis."""
