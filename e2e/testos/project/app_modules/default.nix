{ ... }: { imports = [ ./hello ]; }
