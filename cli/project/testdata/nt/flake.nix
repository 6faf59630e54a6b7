{ outputs = { self }: { nixosConfigurations."[%%nodeName%%]" = "[%%hwArch%%] [%%nixVersion%%]"; }; }
