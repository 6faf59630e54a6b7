{ ... }: { imports = [ ./shop ]; }
