"""What runs on a CPU in machine code: C++ that is compiled when it is first needed."""
