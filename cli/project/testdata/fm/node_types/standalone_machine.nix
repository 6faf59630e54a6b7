{ pkgs, ... }: { environment.systemPackages = [ pkgs.htop ]; } # [%%nodeName%%]
