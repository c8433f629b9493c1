"""One file per op: its public function, checks, autograd.Function, schema and fakes."""
