"""Where other libraries call memhead; each module is imported only by those who use that library."""
