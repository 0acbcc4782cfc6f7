"""What must survive a restart. The only code of the controller that knows SQL; one file a noun."""
