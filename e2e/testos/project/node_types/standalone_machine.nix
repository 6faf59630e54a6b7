# What every machine of this type gets; testos needs nothing here.
{ ... }: { etc."testos/node-type".text = "standalone_machine\n"; }
