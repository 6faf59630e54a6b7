# One flake per node, as in the templates: it has no inputs, so it needs no lock and no network.
{
  description = "testos on [%%nodeName%%]";

  outputs = { self }: {
    nixosConfigurations."[%%nodeName%%]" = import ./modules/testos {
      nodeName = "[%%nodeName%%]";
      nixVersion = "[%%nixVersion%%]";
      system = "[%%hwArch%%]";
      modules = [ ./configuration.nix ];
    };
  };
}
