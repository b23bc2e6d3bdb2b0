"""Records a running engine's routing into a trace, where an operator switched that on."""
