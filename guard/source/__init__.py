"""Where a running server's policies come from: notices that they changed, and reads them whole."""
