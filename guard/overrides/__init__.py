"""What operators changed at run time, over the policies as they are written: masks, modes, the kill
switch. A reload keeps it, and so does a restart."""
