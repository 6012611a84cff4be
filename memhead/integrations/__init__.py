"""Where other libraries call memhead: each module is imported only by who uses that library."""
