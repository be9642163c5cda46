output "security_groups" {
  description = "Node to its security group."
  value       = { for node, class in local.class_of : node => aws_security_group.this[class].id }
}

output "instance_profiles" {
  description = "Node to its instance profile; nodes that do not use the lake have none."
  value = {
    for node, groups in var.nodes : node => length(setintersection(groups, var.lake_groups)) > 0 ? aws_iam_instance_profile.lake.name : null
  }
}

output "key_name" {
  description = "The admin's key pair."
  value       = aws_key_pair.admin.key_name
}

output "bastion" {
  description = "The bastion's instance, and its address inside."
  value       = { instance_id = aws_instance.bastion.id, private_address = aws_instance.bastion.private_ip }
}

output "bastion_address" {
  description = "Public address of the bastion."
  value       = aws_eip.bastion.public_ip
}
