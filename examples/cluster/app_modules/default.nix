# The app modules. Each is off until a node's own file enables it.
{
  imports = [ ./hello ./hello-pod ];
}
