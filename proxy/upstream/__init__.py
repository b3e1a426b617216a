"""The backend side: connections to it, and who gets one."""
