output "platform" {
  description = "Inventory, lake, tunnels, ssh configuration and cost."
  value       = module.platform
}
